"""Who is there: workers announce themselves under a lease, routers watch."""
