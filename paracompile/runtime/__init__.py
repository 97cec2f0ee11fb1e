"""What runs when a compiled model runs, and what ranks say to each other while it is compiled.

Nothing here knows a graph or a layout: imports point down only (runtime <- layout <- patterns <- passes <- backend).
"""
