"""A server for a base and several adapters, with the interface of OpenAI's.

`scheduler` runs the model: rows of one batch, each with an adapter of its own. `answer` makes text of a row's tokens,
`requests` reads what is asked, `objects` writes what is answered, and `api` joins them to HTTP.
"""
