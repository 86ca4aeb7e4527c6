//! `delete`: merges members away into their children, or removes a tip.
//!
//! [`plan`](plan()) says what would be done, from a scan and the maps, changing nothing; [`run`](run()) does
//! just that. Rules on what may be deleted are in `select`, one merge is in `merge`, the order of names
//! in `run`.

mod context;
mod follow;
mod merge;
mod mode;
mod plan;
mod report;
mod run;
mod select;
mod stub;
mod worth;

pub use context::{Context, Gate, Terms};
pub use plan::{Entry, Mode, Plan, TreePlan, plan};
pub use report::{Outcome, Report, Status};
pub use run::run;
pub use select::{InPlacePolicy, ModeChoice, Request};
pub use worth::{plan_worth, selectable};
