// The smallest program that there is: what starting the runtime costs.
