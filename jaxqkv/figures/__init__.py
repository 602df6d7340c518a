"""All matplotlib code: displays, panels, style and drawing. Independent of the studies."""
