"""`gptlab serve`: an API that OpenAI's clients speak, and a page to talk to models and to tell them apart."""
