"""Runs and shows the stages of the ``breakhis`` command in Airflow: operators, reviews, links and pages.

operators.py      a stage as a task; places.py chooses where it runs: process.py or containers.py
environment.py    the part of the worker's environment that a stage gets
connections.py    the environment variables that a stage gets of Airflow connections
yaml_dags.py      DAGs made of YAML files
review_operator.py  the task that asks a reviewer
reminders.py      reminds of reviews that nobody has answered
run_conf.py       refuses a run whose conf has a key that nothing reads
notifications.py  messages about failures and reviews, by Airflow's notifiers
fab.py            users and roles where Airflow runs as servers
links.py          links on tasks: MLflow, validation reports and the review page
addresses.py      addresses of Airflow's pages, and of those that this plugin serves
web.py            serves validation reports and the review pages behind Airflow's login
review_list.py    the list of reviews: those that wait, those on their way, and the decisions
review_pages.py   what a reviewer reads, made of the evidence in the store
airflow_database.py  reads which reviews wait, and how the audit log's last check ended
glossary.py       explanations of metrics and terms on the review pages
"""
