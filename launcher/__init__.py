"""Outside the job: validate, plan, get nodes, start the job, look after it. Never imports torch."""
