"""How Airflow runs and shows the stages of the ``breakhis`` command: operators, the review, links and report pages.

operators.py      a stage as a task, and where it runs
environment.py    what a stage may see of the worker's environment
review_operator.py  the question to a reviewer
notifications.py  who is told when a task fails
links.py          buttons on tasks: MLflow and validation reports
addresses.py      addresses of Airflow's pages, and of those that this plugin serves
web.py            serves validation reports and the review pages behind Airflow's login
review_pages.py   what a reviewer reads, made of the evidence in the store
airflow_database.py  which reviews wait, and how the audit log's last check ended
glossary.py       the words that the review pages explain
"""
