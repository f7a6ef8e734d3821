"""Operation: what happens to data and models after they were made, such as erasing a patient."""
