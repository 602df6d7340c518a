"""All the matplotlib there is: displays, panels, style, drawing. Knows no study."""
