"""An HTTP server with the OpenAI completions and chat endpoints (`bellbox serve`; extra `serve`)."""
