"""What the loop asks of a language model. Adapters live beside this file, one per way out.

`agent.model.contract` holds the types; importing it loads no provider library.
"""
