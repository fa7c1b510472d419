"""Self-contained pages: HTML and SVG without a network, a script or a library, and their pictures by Chromium."""
