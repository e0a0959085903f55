"""Tables and plots in one style, and the report on finished runs: `python -m hf_ibnorm.report RUN... --output DIR`."""
