"""The tools an agent can call: `contract` for the types, `router` to find and run them, a file per family."""
