"""One module a published study: what each of its figures needs, and its arrays and labels."""
