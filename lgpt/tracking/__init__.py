"""The one door to MLflow."""
