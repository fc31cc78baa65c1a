"""Which memory remembers what: recall jobs, their results, and the report made of them."""
