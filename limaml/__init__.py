"""LiMAML in production: meta-learned personalisation of a ranking network, from events to served scores."""
