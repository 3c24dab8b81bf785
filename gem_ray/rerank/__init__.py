"""The uncertainty filter and the LLaVA reranker (§3.3)."""
