//! Devices of the machine and the buses they sit on. Never sees KVM: guest
//! memory, interrupts and doorbells come as traits and types from outside.

pub mod bus;
pub mod legacy;
