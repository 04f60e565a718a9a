"""Who may do what: tenants, what belongs to each of them, and the keys that a request proves its caller with.

Every row of the catalogue, of the job queue and of the data sets belongs to one tenant. `tenants` has the names of
tenants, `keys` says what a key is, `grants` remembers the keys that were verified, `usage` counts the predictions of
each tenant, and `idempotency` has the keys with which a request is repeated. Nothing here knows HTTP:
`app.http.authentication` reads headers and cookies. Read `keys` first.
"""
