"""The schemas of what deltaguard reports. JSON, terminal, HTML and model card are drawn from them alone."""
