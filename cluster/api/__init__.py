"""HTTP API (OpenAI-compatible), router and the client of the engines' ports. Runs without Ray and without torch.

`router.RouterCore` is the router without HTTP; `app.create_app(core)` is the ASGI application around it.
"""
