//! `delete`: merges members away into their children, or removes a tip. `consolidate`, which merges all that is
//! below a member into it, and takes nobody away, is another [`Aim`] of the same plan.
//!
//! [`plan`](plan()) says what would be done, from a scan and the maps, changing nothing; [`run`](run()) does
//! just that. Rules on what may be deleted are in `select`, on what may be made a base in `consolidate`, on what the
//! policy wants to be one in `due`; one merge is in `merge`, the order of names in `run`.

mod consolidate;
mod context;
mod document;
mod due;
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
pub use document::{MergeDocument, Shown};
pub use due::{Due, Yardstick, due};
pub use plan::{Entry, Mode, Plan, STUB_GRACE, TreePlan, plan};
pub use report::{Outcome, Report, Status};
pub use run::run;
pub use select::{Aim, InPlacePolicy, ModeChoice, Request};
pub use worth::{plan_worth, selectable};
