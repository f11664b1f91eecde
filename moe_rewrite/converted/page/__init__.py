"""The page that `inspect(html=...)` and `moe.report.html()` write: one file, no network."""
