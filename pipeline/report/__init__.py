"""Report: one HTML file about a batch, with SVG charts, sample photos with boxes, and rejects."""
