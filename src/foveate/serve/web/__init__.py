"""What a client sees: the app, its gate and routes, answers in the forms of OpenAI, and the page."""
