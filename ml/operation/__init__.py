"""What happens to data and models afterwards: erasing a patient."""
