"""The page about runs: what ``dvla-fast report`` reads from their folders, and draws."""
