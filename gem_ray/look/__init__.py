"""The look of everything that people see: one theme for pages, reports and plots."""
