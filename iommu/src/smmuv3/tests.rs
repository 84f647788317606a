//! Tests of the model as a driver sees it.

mod ats;
mod bringup;
mod commands;
mod configuration;
mod invalidation;
mod lookup;
mod queues;
mod rig;
mod sizes;
mod stalls;
mod walks;
