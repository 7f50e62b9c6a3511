"""Operations that quantizers share: nearest codes and k-means, gradient estimators, entropies, seeded layers."""
