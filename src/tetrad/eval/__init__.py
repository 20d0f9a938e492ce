"""Any policies on the same prompts, judged by others than what trained them."""
