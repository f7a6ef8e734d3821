"""How Airflow runs and shows the stages of the ``breakhis`` command: operators, the review, links and report pages.

operators.py      a stage as a task, and where it runs
environment.py    what a stage may see of the worker's environment
review_operator.py  the question to a reviewer
notifications.py  who is told when a task fails
links.py          buttons on tasks: MLflow and validation reports
web.py            serves validation reports behind Airflow's login
"""
