"""Colors that charts, panels and contact sheets share; templates/style.css.j2 has the same."""

TEXT, TEXT_LIGHT = "#22262c", "#5b616b"
BACKGROUND = "#f6f7f9"
BLUE, ORANGE, GREEN, GRAY = "#1b6ca8", "#d95f02", "#2a9d5c", "#8a8f98"
LINE_COLORS = (BLUE, ORANGE, GREEN, "#8e44ad", "#7f6000", "#c0392b")
