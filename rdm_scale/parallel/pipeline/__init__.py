"""Pipeline parallelism: schedules, their execution, and the messages between stages."""
