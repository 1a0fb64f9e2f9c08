"""Pictures of results: charts from rows, drawn as SVG, PNG or PDF, or on a page of HTML."""
