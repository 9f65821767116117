"""Ways to start the job: submitit, files for `accelerate launch`, and the check in front of both."""
