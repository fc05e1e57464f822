"""The program around the library: settings and recipes, run directories, one module per command.

Nothing here imports Keras before `backend.choose` has settled what it computes with: `main`,
`settings` and `recipes` need only the standard library, and the module of a command is imported
once it is known which one runs.
"""
