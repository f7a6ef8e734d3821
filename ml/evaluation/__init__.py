"""What a model's predictions are worth: metrics, intervals, the decision rule, comparison, figures, report."""
