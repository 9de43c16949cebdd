"""The page that shows a load to people: figures and pictures from numbers that are gathered already; no services."""
