"""HTML pages: the gallery of figures and the view of one text's attention."""
