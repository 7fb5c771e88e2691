"""The steps from one version's tables to the next's; one that was released is never changed."""
