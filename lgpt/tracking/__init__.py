"""The one door to MLflow: metrics go to metrics.jsonl first, a thread sends them on."""
