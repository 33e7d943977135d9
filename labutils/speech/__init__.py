"""Chapter 12, spoken: queries as sound, what is heard, how soon and how wrongly."""
