//! How images relate: the graph of members, the view through a chain, and the planning of a merge. Pure:
//! nodes hold plain facts, maps come in as iterators, nothing here sees a backend.

pub mod view;
