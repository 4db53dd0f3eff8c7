"""Pictures of a schedule in time: terminal, SVG, HTML."""
