"""From a run to the champion: evidence, policies, gates, reviews, decisions and the audit log."""
