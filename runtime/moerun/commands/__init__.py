"""The commands of `moerun`, one module each. What is heavy is imported when a command runs."""
