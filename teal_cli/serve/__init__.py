"""An HTTP server: OpenAI's API, a chat page and metrics, on top of the scheduler of `teal_cli.decode`."""
