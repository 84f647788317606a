//! Tests of the model through registers, queues and tables, as a driver uses
//! it.

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
mod stream_tlb;
mod walks;
