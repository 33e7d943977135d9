"""Speech: spoken queries, what is heard, how soon and how wrongly (chapter 12)."""
