"""The page of a service, for people: jobs, files and models of the organisation whose key they show."""
